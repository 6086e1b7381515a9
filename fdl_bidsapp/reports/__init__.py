"""What people look at: figures of a scan, a page for each participant, a page for the cohort."""
