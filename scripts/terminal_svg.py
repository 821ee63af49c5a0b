#!/usr/bin/env python3
r"""Runs a command on a terminal of its own and draws what it shows as an SVG, readable on light and dark pages.

    python3 scripts/terminal_svg.py --out docs/demo.svg \
        --type "Once upon a time, in autumn, Mia hid the silver key under the old bridge. Tom put the red lantern inside the dark cave. \
Later the clouds went away." --type "Where is the silver key?" --type "Where is the red lantern?" --type "" -- bash scripts/demo.sh

draws the picture of the README (the second time, when everything is built).

Each --type is a line that is typed when the program shows a prompt ("> " at the start of a line). Nothing is cut or edited, except that the
path of the current folder is left out where the program prints it. Needs Python's standard library only, on Linux or macOS.
"""

import argparse
import codecs
import fcntl
import html
import os
import pty
import re
import select
import shlex
import struct
import sys
import termios
import time

CELL_WIDTH, CELL_HEIGHT, FONT_SIZE, PADDING, BAR = 8.4, 19, 14, 16, 30
STYLE = """
  .page { fill: #f6f8fa; stroke: #d0d7de; } .dot { fill: #d0d7de; }
  text { font: 14px ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace; white-space: pre; fill: #1f2328; }
  .bold { font-weight: 600; } .green { fill: #1a7f37; } .typed { fill: #0550ae; font-weight: 600; } .faint { fill: #6e7781; }
  @media (prefers-color-scheme: dark) {
    .page { fill: #0d1117; stroke: #30363d; } .dot { fill: #30363d; }
    text { fill: #e6edf3; } .green { fill: #3fb950; } .typed { fill: #79c0ff; } .faint { fill: #8d96a0; }
  }
"""
ESCAPE = re.compile(r"\x1b\[([?0-9;]*)([A-Za-z])")


class Screen:
    """What a terminal shows after the output of a program: text, line ends, cursor up, erased lines, bold and green."""

    def __init__(self, columns):
        self.columns, self.lines, self.row, self.column, self.style = columns, [[]], 0, 0, ""

    def put(self, char):
        if self.column == self.columns:
            self.newline()
        line = self.lines[self.row]
        line.extend([(" ", "")] * (self.column + 1 - len(line)))
        line[self.column] = (char, self.style)
        self.column += 1

    def newline(self):
        self.row, self.column = self.row + 1, 0
        if self.row == len(self.lines):
            self.lines.append([])

    def control(self, arguments, command):
        number = int(arguments) if arguments.isdigit() else None
        if command == "m":
            codes = set(arguments.split(";"))
            self.style = "" if codes & {"", "0"} else self.style
            self.style = "bold" if codes & {"1"} else self.style
            self.style = "green" if codes & {"32", "92"} else self.style
        elif command == "A":
            self.row = max(0, self.row - (number or 1))
        elif command == "K":
            line = self.lines[self.row]
            del line[0 if number == 2 else self.column :]
        elif command == "J":
            del self.lines[self.row + 1 :]
            del self.lines[self.row][self.column :]

    def write(self, text):
        """Takes output and returns the beginning of an escape sequence that is still incomplete."""
        position = 0
        while position < len(text):
            char = text[position]
            if char == "\x1b":
                match = ESCAPE.match(text, position)
                if match is None:
                    if re.fullmatch(r"\x1b(\[[?0-9;]*)?", text[position:]):
                        return text[position:]
                    position += 1
                    continue
                self.control(*match.groups())
                position = match.end()
                continue
            if char == "\n":
                self.newline()
            elif char == "\r":
                self.column = 0
            elif char >= " ":
                self.put(char)
            position += 1
        return ""

    def shows_prompt(self):
        return "".join(char for char, _ in self.lines[self.row]).rstrip() == ">" and self.column == 2


def run(command, columns, typed, delay):
    """Runs the command and returns the screen. Lines are typed when a prompt is shown."""
    screen = Screen(columns)
    for text, style in (("$ ", "faint"), (shlex.join(command), "typed")):
        screen.style = style
        screen.write(text)
    screen.style = ""
    screen.newline()
    child, terminal = pty.fork()
    if child == 0:
        os.execvp(command[0], command)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    settings = termios.tcgetattr(terminal)
    settings[3] &= ~termios.ECHO  # typed lines are drawn here, in their own colour
    termios.tcsetattr(terminal, termios.TCSANOW, settings)
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    pending, folder = "", os.getcwd() + "/"
    lines = list(typed)
    while True:
        ready, _, _ = select.select([terminal], [], [], delay)
        if not ready:
            if lines and screen.shows_prompt():
                screen.style = "typed"
                screen.write(lines[0])
                screen.style = ""
                screen.newline()
                os.write(terminal, lines.pop(0).encode() + b"\n")
            continue
        try:
            data = os.read(terminal, 65536)
        except OSError:
            data = b""
        if not data:
            break
        text = decoder.decode(data)
        pending = screen.write((pending + text).replace(folder, ""))
        time.sleep(0.02)  # so that a path rarely comes in two pieces
    _, status = os.waitpid(child, 0)
    if status != 0:
        sys.exit(f"terminal_svg: {shlex.join(command)} ended with status {os.waitstatus_to_exitcode(status)}")
    return screen


def draw(screen, title):
    lines = screen.lines
    while lines and not any(char != " " for char, _ in lines[-1]):
        lines = lines[:-1]
    width = round(screen.columns * CELL_WIDTH + 2 * PADDING)
    height = BAR + len(lines) * CELL_HEIGHT + PADDING
    svg = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img">',
        f"<title>{html.escape(title)}</title>",
        f"<style>{STYLE}</style>",
        f'<rect class="page" x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="8"/>',
    ]
    svg += [f'<circle class="dot" cx="{PADDING + 4 + 18 * i}" cy="16" r="5"/>' for i in range(3)]
    for row, line in enumerate(lines):
        y = BAR + row * CELL_HEIGHT + FONT_SIZE
        start = 0
        while start < len(line):
            style = line[start][1]
            end = start
            while end < len(line) and line[end][1] == style:
                end += 1
            text = "".join(char for char, _ in line[start:end])
            stripped = text.rstrip()
            if stripped:
                indent = len(stripped) - len(stripped.lstrip())
                x = PADDING + (start + indent) * CELL_WIDTH
                shown = html.escape(stripped.lstrip(), quote=False)
                length = (len(stripped) - indent) * CELL_WIDTH
                name = f' class="{style}"' if style else ""
                svg.append(f'<text{name} x="{x:.1f}" y="{y}" textLength="{length:.1f}" xml:space="preserve">{shown}</text>')
            start = end
    svg.append("</svg>")
    return "\n".join(svg) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True)
    parser.add_argument("--columns", type=int, default=96)
    parser.add_argument("--type", action="append", default=[], metavar="TEXT", help="a line to type at the next prompt")
    parser.add_argument("--delay", type=float, default=0.3, help="seconds of silence after a prompt before a line is typed")
    parser.add_argument("command", nargs="+")
    options = parser.parse_args()
    screen = run(options.command, options.columns, options.type, options.delay)
    for line in screen.lines:
        print("".join(char for char, _ in line).rstrip())
    with open(options.out, "w", encoding="utf-8") as file:
        file.write(draw(screen, f"The output of {shlex.join(options.command)} on a terminal"))


if __name__ == "__main__":
    main()
