"""Runs the commands of the transcripts in README.md and docs/ again and writes what they print.

    pip install -e '.[examples,export]' && python tools/transcripts.py

A transcript is a fenced block after the line `<!-- transcript -->`. Its lines that begin with `$ `
are the commands (a command that ends with a backslash continues on the next line); everything else
is replaced. One shell runs the blocks of all pages in order, in a scratch folder that holds

    main.py, configs/, tools/, examples/, demo/   links to this repository
    runs/quickstart/                              configs/quickstart.py, trained
    digits/                                       the first held-out digits, 0.png to 7.png
    faces/{train,validation}/{face,other}/        the images of examples/linear_probe.py
    text.jpg                                      a file that is not an image

The quickstart takes minutes. --keep=FOLDER keeps the scratch folder and uses what is in it.
"""

import argparse
import contextlib
import os
import re
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
BLOCK = re.compile(r"(?<=<!-- transcript -->\n)(```\w*\n)(.*?)(```)", re.DOTALL)
COMMAND = re.compile(r"^\$ ((?:.*\\\n)*.*)$", re.MULTILINE)
LINKS = ("main.py", "configs", "tools", "examples", "demo")
QUICKSTART = "python main.py --config=configs/quickstart.py --workdir=runs/quickstart"


class Shell:
    """A bash in the scratch folder; `run` returns what a command prints, without its paths.

    A command that was run before is not run again: its output is returned again.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.outputs: dict[str, str] = {}
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "HF_HOME": str(folder / "hub"),
            "HF_HUB_OFFLINE": "1",
            "TERM": "dumb",
        }
        self.process = subprocess.Popen(
            ["bash"],
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, command: str) -> str:
        """Runs one command, which may end with any status."""
        if command in self.outputs:
            return self.outputs[command]
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        end = f"--- end of command {len(self.outputs)} ---"
        self.process.stdin.write(f"{command}\nprintf '\\n%s\\n' '{end}'\n")
        self.process.stdin.flush()
        lines = []
        for line in self.process.stdout:
            if line == f"{end}\n":
                break
            lines.append(line)
        else:
            raise SystemExit(f"error: the shell ended in: {command}")
        # The line break before the end's line belongs to a command only if it printed one itself.
        output = "".join(lines).removesuffix("\n")
        for path, name in ((f"{self.folder}/", ""), (f"{ROOT}/", ""), (str(Path.home()), "~")):
            output = output.replace(path, name)
        self.outputs[command] = output
        return output


def rewrite(text: str, shell: Shell) -> str:
    """Returns a page with new output for the commands of each transcript."""

    def block(match: re.Match[str]) -> str:
        lines = []
        for command in COMMAND.findall(match[2]):
            print(f"$ {command}", flush=True)
            output = shell.run(command)
            print(output, end="", flush=True)
            lines.append(f"$ {command}\n{output}")
            if output and not output.endswith("\n"):
                lines.append("\n")
        return match[1] + "".join(lines) + match[3]

    return BLOCK.sub(block, text)


def write_inputs(folder: Path) -> None:
    """Writes what the commands read: links, images, and a file that is not an image."""
    from mambaout_jax.data.sources import Dataset, open_source

    for name in LINKS:
        with contextlib.suppress(FileExistsError):
            (folder / name).symlink_to(ROOT / name)
    (folder / "text.jpg").write_text("This is text.\n")
    (folder / "digits").mkdir(exist_ok=True)
    dataset = Dataset("tfds", "digits", "", "train", "validation", 10)
    digits = open_source(dataset, dataset.eval_split)
    for number in range(8):
        (folder / "digits" / f"{number}.png").write_bytes(digits[number]["image"])
    write_faces(folder / "faces")


def write_faces(folder: Path) -> None:
    """Writes the images of examples/linear_probe.py: 150 to train on, 50 to evaluate."""
    from PIL import Image

    images, is_face = runpy.run_path(str(ROOT / "examples/linear_probe.py"))["faces"]((32, 32))
    for number, (image, face) in enumerate(zip(images, is_face, strict=True)):
        split = "train" if number < 150 else "validation"
        file = folder / split / ("face" if face else "other") / f"{number:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(file)


def main(argv: list[str] | None = None) -> None:
    """Rewrites the pages."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--keep", metavar="FOLDER", type=Path, help="the scratch folder, kept")
    parser.add_argument("pages", nargs="*", type=Path, help="pages, all unless given")
    args = parser.parse_args(argv)
    with contextlib.ExitStack() as stack:
        folder = args.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        folder = folder.resolve()
        write_inputs(folder)
        shell = Shell(folder)
        log = folder / "quickstart.log"
        if log.exists():
            shell.outputs[QUICKSTART] = log.read_text(encoding="utf-8")
        log.write_text(shell.run(QUICKSTART), encoding="utf-8")
        for page in args.pages or PAGES:
            text = page.read_text(encoding="utf-8")
            page.write_text(rewrite(text, shell), encoding="utf-8")


if __name__ == "__main__":
    main()
