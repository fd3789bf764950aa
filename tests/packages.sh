#!/bin/sh
# Install what vpcctl needs and this machine lacks, if that may be done; else say what to install.
# With --ci, --distros or --bench also what only that needs. Does nothing where all is there.
PATH="$PATH:/usr/sbin:/sbin"

have() { command -v "$1" >/dev/null 2>&1; }

missing() {
    # program, package on Debian, package on RHEL
    have ip       || echo "$1" iproute2 iproute
    have iptables || echo "$1" iptables iptables
    have unshare  || echo "$1" util-linux util-linux
    have mount    || echo "$1" mount util-linux
    have python3  || echo "$1" python3 python3
    case "$1" in
    ci)
        have make        || echo "$1" make make
        have nft         || echo "$1" nftables nftables;;
    distros)
        have debootstrap || echo "$1" debootstrap debootstrap
        have pivot_root  || echo "$1" util-linux util-linux;;
    bench)
        have sysctl      || echo "$1" procps procps-ng;;
    esac
}

mode=${1#--}
mode=${mode:-use}
if have apt-get; then column=2; else column=3; fi
packages=$(missing $mode | cut -d' ' -f$column | sort -u | tr '\n' ' ')
[ -z "$packages" ] && exit 0

if [ "$(id -u)" = 0 ]; then
    as_root=
elif have sudo && sudo -n true 2>/dev/null; then
    as_root="sudo -n"
else
    echo "These packages are missing, and installing them needs root: $packages" >&2
    if have apt-get; then echo "Type: sudo apt-get install $packages" >&2
    elif have dnf; then echo "Type: sudo dnf install $packages" >&2
    else echo "Type: sudo yum install $packages" >&2; fi
    exit 4
fi

echo "Installing: $packages"
if have apt-get; then
    # the lists of a fresh container are empty
    $as_root env DEBIAN_FRONTEND=noninteractive apt-get update -qq
    $as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $packages >/dev/null
elif have dnf; then
    $as_root dnf install -y -q $packages
elif have yum; then
    $as_root yum install -y -q $packages
else
    echo "No apt-get, dnf or yum here: please install $packages" >&2
    exit 4
fi
left=$(missing $mode)
if [ -n "$left" ]; then
    echo "Still missing after the installation: $packages" >&2
    exit 4
fi
