#!/usr/bin/env bash
# Makes sure that wgpu finds an adapter: where Linux has no usable Vulkan driver, installs Mesa's software one (lavapipe).
# A driver that is there is left alone.
set -euo pipefail

say() { printf 'adapter: %s\n' "$*" >&2; }

as_root() {
    if [ "$(id -u)" -eq 0 ]; then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo "$@"
    else
        say "need root (or sudo) to run: $*"
        return 1
    fi
}

# The Vulkan loader's library: without it no driver is ever found.
has_loader() {
    if command -v ldconfig >/dev/null && ldconfig -p 2>/dev/null | grep -q 'libvulkan\.so\.1'; then
        return 0
    fi
    local dir
    for dir in /usr/lib /usr/lib64 /usr/lib/*-linux-gnu* /usr/local/lib; do
        if [ -e "$dir/libvulkan.so.1" ]; then
            return 0
        fi
    done
    return 1
}

# Drivers announce themselves to the loader by a manifest. Those for hardware are often installed on machines without that
# hardware, so only lavapipe's, or a vendor's own beside a device node, means that there is an adapter.
has_driver() {
    if [ -n "${VK_DRIVER_FILES:-${VK_ICD_FILENAMES:-}}" ]; then
        return 0
    fi
    local dir manifest
    for dir in "${XDG_DATA_HOME:-${HOME:-}/.local/share}" /etc /usr/local/share /usr/share; do
        for manifest in "$dir"/vulkan/icd.d/*.json; do
            [ -e "$manifest" ] || continue
            case "$manifest" in
                *lvp* | *lavapipe* | *swiftshader*) return 0 ;;
                *nvidia*) [ -e /dev/nvidia0 ] && return 0 ;;
                *) compgen -G '/dev/dri/renderD*' >/dev/null && return 0 ;;
            esac
        done
    done
    return 1
}

has_adapter() { has_loader && has_driver; }

case "$(uname -s)" in
    Linux) ;;
    Darwin | MINGW* | MSYS* | CYGWIN*)
        say "Metal and DX12 come with the system, nothing to install"
        exit 0
        ;;
    *)
        say "unknown system $(uname -s): if no adapter is found, install a Vulkan driver"
        exit 0
        ;;
esac

if has_adapter; then
    say "a Vulkan driver is installed"
    exit 0
fi

say "no Vulkan driver found, installing lavapipe (Mesa's software adapter)"
if command -v apt-get >/dev/null; then
    as_root apt-get update -q
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends \
        mesa-vulkan-drivers libvulkan1
elif command -v dnf >/dev/null; then
    as_root dnf install -y mesa-vulkan-drivers vulkan-loader
elif command -v pacman >/dev/null; then
    as_root pacman -Sy --needed --noconfirm vulkan-swrast vulkan-icd-loader
else
    say "this script knows apt-get, dnf and pacman; install a Vulkan driver by hand (Mesa's lavapipe needs no GPU)"
    exit 1
fi

if ! has_adapter; then
    say "the packages are installed, but there is still no Vulkan driver; the Vulkan loader and its icd.d folders tell why"
    exit 1
fi
