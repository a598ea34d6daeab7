"""Runs a notebook's cells without Jupyter, and prints which cells show something: `python run_notebook.py FILE`."""

import ast
import json
import pathlib
import sys


def run(file: str) -> None:
    namespace = {"__name__": "__main__"}
    for number, cell in enumerate(json.loads(pathlib.Path(file).read_text())["cells"]):
        if cell["cell_type"] != "code":
            continue
        tree = ast.parse("".join(cell["source"]), filename=f"cell {number}")
        shown = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, f"cell {number}", "exec"), namespace)
        if shown is not None:
            value = eval(compile(ast.Expression(shown.value), f"cell {number}", "eval"), namespace)
            for kind in ("_repr_html_", "_repr_png_"):
                if picture := getattr(value, kind, lambda: None)():
                    print(f"cell {number} shows {len(picture)} characters of {kind}", flush=True)


if __name__ == "__main__":
    run(sys.argv[1])
