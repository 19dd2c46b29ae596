#!/usr/bin/env bash
# Shim for the published instruction `cd train && bash build.sh`: the root's build.sh, with the wheel in train/dist too.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
bash "$here/../build.sh" "$@"
if [ $# -eq 0 ] || [ "$1" = wheel ]; then
    rm -rf "$here/dist"
    cp -r "$here/../dist" "$here/dist"
    echo "the same wheel is in train/dist"
fi
