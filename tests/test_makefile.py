"""`make test` runs all tests, although it names their folders one by one, for their order."""

import pathlib
import re

TESTS = pathlib.Path(__file__).parent


def test_make_test_names_every_folder_of_tests():
    recipe = re.search(r"^test: .*?\n\n", (TESTS.parent / "Makefile").read_text(), re.MULTILINE | re.DOTALL)[0]
    folders = {file.parent.relative_to(TESTS).parts[:1] for file in TESTS.rglob("test_*.py")} - {()}
    assert folders and {f"tests/{folder}" for (folder,) in folders} <= set(recipe.split())
