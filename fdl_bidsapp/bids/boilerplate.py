"""The texts that go with the derivatives: what the files are, and how to cite them."""

from __future__ import annotations

BIBLIOGRAPHY = """\
@article{fdl,
  author = {Fu, Guanghui and others},
  title = {Frequency Disentangled Learning for Segmentation of Midbrain Structures from
           Quantitative Susceptibility Mapping Data},
  journal = {arXiv},
  year = {2023},
  eprint = {2302.12980},
  archiveprefix = {arXiv}
}

@article{multimodal,
  author = {Fu, Guanghui and others},
  title = {Fourier Disentangled Multimodal Prior Knowledge Fusion for Red Nucleus Segmentation in
           Brain {MRI}},
  journal = {arXiv},
  year = {2022},
  eprint = {2211.01353},
  archiveprefix = {arXiv}
}

@article{bids,
  author = {Gorgolewski, Krzysztof J. and others},
  title = {The brain imaging data structure, a format for organizing and describing outputs of
           neuroimaging experiments},
  journal = {Scientific Data},
  volume = {3},
  pages = {160044},
  year = {2016},
  doi = {10.1038/sdata.2016.44}
}

@article{bidsapps,
  author = {Gorgolewski, Krzysztof J. and others},
  title = {{BIDS} apps: Improving ease of use, accessibility, and reproducibility of neuroimaging
           data analysis methods},
  journal = {PLOS Computational Biology},
  volume = {13},
  number = {3},
  pages = {e1005209},
  year = {2017},
  doi = {10.1371/journal.pcbi.1005209}
}

@article{nipype,
  author = {Gorgolewski, Krzysztof and others},
  title = {Nipype: a flexible, lightweight and extensible neuroimaging data processing framework in
           {Python}},
  journal = {Frontiers in Neuroinformatics},
  volume = {5},
  pages = {13},
  year = {2011},
  doi = {10.3389/fninf.2011.00013}
}

@article{pybids,
  author = {Yarkoni, Tal and others},
  title = {{PyBIDS}: {Python} tools for {BIDS} datasets},
  journal = {Journal of Open Source Software},
  volume = {4},
  number = {40},
  pages = {1294},
  year = {2019},
  doi = {10.21105/joss.01294}
}

@misc{nibabel,
  author = {Brett, Matthew and others},
  title = {nipy/nibabel},
  publisher = {Zenodo},
  doi = {10.5281/zenodo.591597}
}

@article{syn,
  author = {Avants, Brian B. and others},
  title = {Symmetric diffeomorphic image registration with cross-correlation: Evaluating automated
           labeling of elderly and neurodegenerative brain},
  journal = {Medical Image Analysis},
  volume = {12},
  number = {1},
  pages = {26--41},
  year = {2008},
  doi = {10.1016/j.media.2007.06.004}
}

@article{mni152,
  author = {Fonov, Vladimir and others},
  title = {Unbiased average age-appropriate atlases for pediatric studies},
  journal = {NeuroImage},
  volume = {54},
  number = {1},
  pages = {313--327},
  year = {2011},
  doi = {10.1016/j.neuroimage.2010.07.033}
}
"""

README = """\
# Deep nuclei

Masks and measures of iron-rich deep nuclei, made by fdl-bidsapp.

| file | content |
| --- | --- |
| `*_space-orig_seg-fdl_dseg.nii.gz` | label map on the grid of the scan (see `seg-fdl_dseg.tsv`) |
| `*_space-orig_label-*_mask.nii.gz` | one mask per structure |
| `*_space-orig_seg-fdl_probseg.nii.gz` | probabilities, one volume per structure (on request) |
| `*_space-MNI152NLin2009aSym_*` | the label map in standard space (on request) |
| `*_xfm.h5` | the transform to standard space |
| `*_morph.tsv` | volume (mm³), QSM (ppm), R2* (1/s) and quality of each structure |
| `*_morph.json` | what became of the scan, and the columns of its table |
| `sub-*.html`, `figures` | the participants to look at, and to rate |
| `group_morph.tsv` | the tables of all scans (group level) |
| `group_morph.html` | the cohort to look at |
| `group_summary.tsv` | description by group; `group_norms.tsv`: normal ranges by age |

How to cite: `logs/CITATION.md`. Files in `.bidsignore` are beyond the BIDS specification.
"""


def methods(version: str, *, registration: bool = False) -> str:
    """Return the text for a methods section, with the keys of `BIBLIOGRAPHY`.

    Parameters
    ----------
    version
        Of this app.
    registration
        Whether standard-space output was made.

    Examples
    --------
    >>> "[@syn]" in methods("1.0.0"), "[@syn]" in methods("1.0.0", registration=True)
    (False, True)
    """
    standard_space = (
        "\nLabel maps were brought to the MNI152NLin2009aSym template [@mni152] by affine and"
        "\nsymmetric diffeomorphic registration with ANTs [@syn]."
        if registration
        else ""
    )
    return f"""\
# Methods

Deep nuclei were segmented with fdl-bidsapp {version}, a BIDS App [@bids; @bidsapps] whose networks
separate low from high spatial frequencies [@fdl; @multimodal].{standard_space}
Files were found with PyBIDS [@pybids] and read with NiBabel [@nibabel]; the steps were run by
Nipype [@nipype].

# References

The keys above are those of `CITATION.bib`.
"""
