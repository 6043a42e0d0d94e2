"""Check that text files end with one newline and have no trailing spaces, and that no file is larger than 1 MB."""

import sys
from pathlib import Path

MAX_BYTES = 1_000_000


def problems(path: Path) -> list[str]:
    """What is wrong with a file; empty if nothing is."""
    if not path.is_file():
        return []
    content = path.read_bytes()
    if len(content) > MAX_BYTES:
        return [f"{path}: {len(content):,} bytes; the limit is {MAX_BYTES:,}"]
    if not content or b"\0" in content:
        return []
    found = []
    if not content.endswith(b"\n") or content.endswith(b"\n\n"):
        found.append(f"{path}: must end with exactly one newline")
    for number, line in enumerate(content.split(b"\n"), start=1):
        if line != line.rstrip():
            found.append(f"{path}:{number}: trailing spaces")
    return found


def main() -> int:
    """Print the problems of the files named on the command line; the exit code is 1 if there are any."""
    found = [problem for name in sys.argv[1:] for problem in problems(Path(name))]
    for problem in found:
        print(problem)
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
