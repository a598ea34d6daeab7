"""What pyproject.toml cannot say: the files of configs/ are in the wheel, as osv_jax/configs/."""

import pathlib
import shutil

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    def run(self):
        super().run()
        if not self.editable_mode:
            shutil.copytree("configs", pathlib.Path(self.build_lib, "osv_jax", "configs"), dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithConfigs})
