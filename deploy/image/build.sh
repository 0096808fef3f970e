#!/usr/bin/env bash
# Builds the image with buildah, then runs the digits job in it under a pod's restrictions: non-root, no capabilities,
# read-only root with /tmp and /workspace writable, no network. Needs root, buildah and util-linux; no daemon.
#
#   deploy/image/build.sh [cpu|gpu] [argument of `buildah build` ...]
#
# IMAGE names the result. BASE_TAR is a root file system with python3 and its venv module (as mmdebstrap makes one)
# that stands in for the base image where no registry can be reached. BUILD_SECONDS and RUN_SECONDS bound the two steps.
set -euo pipefail
cd "$(dirname "$0")/../.."
variant=${1:-cpu}
[ $# -eq 0 ] || shift
case $variant in cpu | gpu) ;; *) echo "build.sh: the variant is cpu or gpu, not '$variant'" >&2; exit 2 ;; esac
image=${IMAGE:-localhost/manymodes:$variant}
export BUILDAH_ISOLATION=${BUILDAH_ISOLATION:-chroot} STORAGE_DRIVER=${STORAGE_DRIVER:-overlay}

if [ -n "${BASE_TAR:-}" ]; then
    base=$(buildah from scratch)
    buildah add --quiet "$base" "$BASE_TAR" / > /dev/null
    buildah commit --quiet --rm "$base" localhost/manymodes-base > /dev/null
    set -- --build-arg BASE=localhost/manymodes-base "$@"
fi

began=$SECONDS
timeout "${BUILD_SECONDS:-3600}" buildah build --layers --tag "$image" --build-arg "VARIANT=$variant" \
    --file deploy/image/Dockerfile --ignorefile deploy/image/Dockerfile.dockerignore "$@" .
echo "built $image in $((SECONDS - began)) s, $(buildah images --format '{{.Size}}' "$image")"

container=$(buildah from --pull-never "$image")
trap 'buildah rm "$container" > /dev/null' EXIT
config() { buildah inspect --type image --format "$1" "$image"; }
root=$(buildah mount "$container") user=$(config '{{.OCIv1.Config.User}}')
mapfile -t environment < <(config '{{range .OCIv1.Config.Env}}{{println .}}{{end}}' | sed '/^$/d')
export root user

began=$SECONDS
# The mounts below are seen by this process only, and end with it.
timeout "${RUN_SECONDS:-600}" unshare --mount --pid --ipc --net --fork --kill-child bash -s "${environment[@]}" << 'EOF'
set -euo pipefail
ip link set lo up
mount --make-rprivate /
mount --bind "$root" "$root"
mount -o remount,bind,ro "$root"
mount -t proc proc "$root/proc"
mount --bind /sys "$root/sys"
mount -o remount,bind,ro "$root/sys"
mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"
mount -t tmpfs -o "mode=0700,uid=${user%:*},gid=${user#*:}" tmpfs "$root/workspace"
mount -t tmpfs -o mode=0755 tmpfs "$root/dev"
for device in null zero full random urandom; do
    : > "$root/dev/$device"
    mount --bind "/dev/$device" "$root/dev/$device"
done
mkdir -m 1777 "$root/dev/shm"
mount -t tmpfs -o mode=1777 tmpfs "$root/dev/shm"
exec env -i "$@" "$(command -v chroot)" "$root" setpriv --reuid "${user%:*}" --regid "${user#*:}" --clear-groups --no-new-privs \
    --inh-caps=-all --bounding-set=-all bash -ec '
        cd /workspace
        if touch /opt/probe 2> /dev/null || [ "$(id -u)" = 0 ]; then echo "not read-only, or root" >&2; exit 1; fi
        bash -lc "command -v ray python manymodes mlflow" > /dev/null
        manymodes run digits --out runs/digits
        id -un; du -sh --apparent-size / --exclude=/proc --exclude=/dev 2> /dev/null | cut -f1
    '
EOF
echo "ran digits in $image as user $user, read-only root, in $((SECONDS - began)) s"
