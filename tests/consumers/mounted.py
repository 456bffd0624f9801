"""What the other scripts share: a mount for the time of a `with`, the formats that there are, and how
far logits are from other logits."""

import contextlib
import math
import re
import subprocess
import tempfile


@contextlib.contextmanager
def mounted(binary, model, *flags):
    """The directory at which `model` is mounted with these flags."""
    with tempfile.TemporaryDirectory() as mountpoint:
        command = [binary, "mount", str(model), mountpoint, *flags]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
        try:
            yield mountpoint
        finally:
            subprocess.run([binary, "unmount", mountpoint], check=True, capture_output=True)


def listed(binary):
    """The names that `--format` takes."""
    text = subprocess.run([binary, "mount", "--help"], check=True, capture_output=True, text=True).stdout
    option = text[text.index(" --format <") + 1 :]
    option = option[: option.index("\n      --")]
    return re.findall(r"^ +- ([\w-]+): ", option, re.MULTILINE)


def decibels(signal, noisy):
    """The ratio of signal to error, of any array library's numbers."""
    error = ((signal - noisy) ** 2).sum().item()
    power = (signal**2).sum().item()
    return math.inf if error == 0 else 10 * math.log10(power / error) if power else -math.inf
