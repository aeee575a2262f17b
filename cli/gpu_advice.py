"""Why no GPU is used, from the outside: what to type next, for what the engine says of the driver.

The engine knows what the driver answers.  That a card is there all the same, that a container does not get it, or that
its files may not be opened, is to be seen in /dev, /proc and /sys only.
"""

import grp
import os
from pathlib import Path

from ms4.cli import host

INSTALL = "install NVIDIA's driver: sudo ubuntu-drivers install, or https://www.nvidia.com/drivers"
UPDATE = "update NVIDIA's driver: https://www.nvidia.com/drivers"
CONTAINER = "give the container the card: docker run --gpus all, podman run --device nvidia.com/gpu=all"
AGAIN = "sudo modprobe -r nvidia_uvm; sudo modprobe nvidia_uvm; it is missing, or did not survive the sleep"
NONE_SEEN = "there is no NVIDIA card on the bus of this machine"
# What the engine says, and what helps whatever the machine looks like.
KNOWN = {
    "CUDA_VISIBLE_DEVICES": "unset CUDA_VISIBLE_DEVICES",
    "of different versions": "restart the machine: the driver was updated while the old one was at work",
    "stub of it": "take the stubs folder of the CUDA toolkit out of LD_LIBRARY_PATH",
    "not ready yet": "sudo systemctl start nvidia-fabricmanager",
    "driver is too old": UPDATE,
    "cuDevicePrimaryCtxRetain": "another program may have it to itself: nvidia-smi; sudo nvidia-smi -c 0 lets all in",
}


def card_on_bus(root: str = "") -> bool | None:
    """Whether a display or 3D controller of NVIDIA is on the PCI bus; None: the kernel shows no bus."""
    devices = list(Path(f"{root}/sys/bus/pci/devices").glob("*"))
    if not devices:
        return None
    return any(
        host.read(device / "vendor") == "0x10de" and host.read(device / "class").startswith("0x03")
        for device in devices
    )


def in_container(root: str = "") -> bool:
    return any(os.path.exists(f"{root}{mark}") for mark in ("/.dockerenv", "/run/.containerenv"))


def refused(root: str = "") -> str:
    """The command that opens the card's files to this user; empty if they are open, or there are none."""
    for path in (f"{root}/dev/nvidiactl", f"{root}/dev/nvidia0", f"{root}/dev/nvidia-uvm"):
        if os.path.exists(path) and not os.access(path, os.R_OK | os.W_OK):
            owner = os.stat(path)
            if owner.st_gid and owner.st_mode & 0o060 == 0o060:
                return f"{path} may not be opened: sudo usermod -aG {group(owner.st_gid)} $USER, then log in anew"
            return f"{path} may not be opened: sudo chmod a+rw /dev/nvidia*"
    return ""


def group(number: int) -> str:
    try:
        return grp.getgrgid(number).gr_name
    except KeyError:
        return str(number)


def advice(message: str, root: str = "") -> str:
    """What helps where the engine says `message` of the GPU; empty if nothing is known that would."""
    if known := next((fix for words, fix in KNOWN.items() if words in message), ""):
        return known
    if "NVIDIA driver" not in message:
        return ""
    if closed := refused(root):
        return closed
    if "cuInit" in message and os.path.exists(f"{root}/dev/nvidiactl"):
        return AGAIN
    if os.path.exists(f"{root}/dev/dxg"):
        return "install NVIDIA's driver in Windows; WSL gets it from there"
    seen = card_on_bus(root)
    if in_container(root) and seen is not False and not os.path.exists(f"{root}/dev/nvidiactl"):
        return CONTAINER
    if seen:
        return INSTALL if "no NVIDIA driver" in message else f"sudo modprobe nvidia; if that fails, {INSTALL}"
    return NONE_SEEN if seen is False else INSTALL


def is_wanted(message: str, root: str = "") -> bool:
    """Whether this is worth a warning: there is a card, and it is not used."""
    return "NVIDIA driver" not in message or bool(card_on_bus(root)) or bool(refused(root))
