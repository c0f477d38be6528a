#!/usr/bin/env bash
# usage: tools/fetch_nvcc12.sh DESTINATION
# Unpacks nvcc 12.4 with its headers and static runtime into DESTINATION, for CUDA_HOME. Nothing is installed, and root
# is not needed. PyPI's wheels of CUDA 12 have neither nvcc nor a static runtime, so both come from Debian trixie's
# packages. Requires apt and dpkg, and a Debian mirror among the sources of apt. About 1 GB is downloaded.
set -euo pipefail

SUITE=trixie
TOOLKIT=nvidia-cuda-toolkit # nvcc and what it calls
PACKAGES=("$TOOLKIT" nvidia-cuda-dev libcu++-dev)

fail() { echo "fetch_nvcc12: $*" >&2 && exit 1; }

[ $# -eq 1 ] || { sed -n 's/^# usage: /usage: /p' "$0" >&2; exit 2; }
destination=$1
[ "$(uname -sm)" = "Linux x86_64" ] || fail "expected Linux x86_64, got $(uname -sm)"
for command in apt-get dpkg; do command -v "$command" >/dev/null || fail "$command was not found"; done
[ ! -e "$destination" ] || fail "DESTINATION: expected a new folder, got $destination, which exists"

# The machine's own Debian mirror, asked for another suite. The lists, the state and the cache of apt are private.
mirror=$(apt-get indextargets --format '$(COMPONENT) $(REPO_URI)' 'Created-By: Packages' |
  sed -n 's,^main \(.*/debian/*\)$,\1,p')
[ -n "$mirror" ] || fail "expected a mirror of Debian (main) among the sources of apt, found none"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work"/{lists/partial,cache/archives/partial,packages,unpacked}
echo "deb ${mirror%%$'\n'*} $SUITE main non-free" >"$work/sources.list"
touch "$work/status"
apt=(apt-get -qq -o "Dir::Etc::sourcelist=$work/sources.list" -o Dir::Etc::sourceparts=/dev/null
  -o "Dir::State=$work" -o "Dir::State::status=$work/status" -o "Dir::Cache=$work/cache"
  -o "APT::Sandbox::User=$(id -un)")
"${apt[@]}" update
(cd "$work/packages" && "${apt[@]}" download "${PACKAGES[@]}")
# Without the libraries of mathematics, 4 GB.
for package in "$work"/packages/*.deb; do
  dpkg --fsys-tarfile "$package" | tar -x -C "$work/unpacked" --exclude './usr/lib/x86_64-linux-gnu/lib[!c]*' \
    --exclude './usr/lib/x86_64-linux-gnu/libcu[!d]*' --exclude './usr/share/doc/*/changelog*'
done

# NVIDIA's own layout: nvcc finds everything else relative to itself.
usr="$work/unpacked/usr" home="$work/home"
mkdir -p "$home"/{bin,lib64,nvvm/bin}
for tool in bin2c cudafe++ cuobjdump fatbinary nvdisasm nvlink ptxas; do mv "$usr/bin/$tool" "$home/bin/"; done
mv "$usr/lib/$TOOLKIT/bin/nvcc" "$usr/lib/$TOOLKIT/bin/crt" "$home/bin/"
mv "$usr/lib/$TOOLKIT/bin/cicc" "$home/nvvm/bin/"
mv "$usr/lib/$TOOLKIT/libdevice" "$home/nvvm/"
mv "$usr/include" "$home/include"
mv "$usr"/lib/x86_64-linux-gnu/{libcudart_static.a,libcudadevrt.a} "$home/lib64/"
mv "$usr/share/doc/$TOOLKIT/copyright" "$home/LICENSE"
cat >"$home/bin/nvcc.profile" <<'PROFILE'
TOP = $(_HERE_)/..
NVVMIR_LIBRARY_DIR = $(TOP)/nvvm/libdevice
PATH += $(TOP)/nvvm/bin:$(_HERE_):
INCLUDES += "-I$(TOP)/include" $(_SPACE_)
LIBRARIES =+ $(_SPACE_) "-L$(TOP)/lib64"
PROFILE
"$home/bin/nvcc" --version >"$work/version"
mkdir -p "$(dirname "$destination")"
mv "$home" "$destination"
sed -n "s,^Cuda compilation tools\, \(.*\),fetch_nvcc12: \1 in $destination,p" "$work/version"
