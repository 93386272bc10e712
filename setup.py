"""How mmlavit is packaged.

MMEngine, MMCV and the toolboxes are extras on purpose: two distributions provide each of those
import names (`onedl-mmcv` and `mmcv` both own `mmcv/`), and installing one over the other corrupts
both. So `pip install mmlavit` asks for torch and numpy only and never touches whichever is there;
`mmlavit[onedl]` and `mmlavit[openmmlab]` are for an environment that has neither.
"""

import runpy
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
README = ROOT / 'README.md'

# Tools that work on the repository around them: its installer, its demos, what its documents show.
REPOSITORY_TOOLS = (
    'repository',
    'benchmark.py',
    'compare_commits.py',
    'setup_env.py',
    'demo.py',
    'config_table.py',
    'attention_cost.py',
    'architecture_figures.py',
    'experiments.py',
    'real_images.py',
    'roofline.py',
    'start_figure.py',
    'model_zoo.py',
)

# The maintained continuation. Tried together, in this order, with torch 2.13: 0.10.12, 2.3.6,
# 3.5.1, 1.4.2, 1.3.6.
ONEDL = [
    'onedl-mmengine>=0.10.8,<1',
    'onedl-mmcv>=2.3,<2.4',
    'onedl-mmdetection>=3.4,<4',
    'onedl-mmsegmentation>=1.3,<2',
    'onedl-mmpretrain>=1.3,<2',
    'torchvision',  # mmpretrain imports it without declaring it
    'safetensors',  # published weights
]

# The original names. Tried together, in this order, with torch 2.1.2: 0.10.7, 2.1.0, 3.3.0, 1.2.2,
# 1.2.0. mmdet 3.3 and mmsegmentation 1.2 refuse mmcv 2.2, and all five were written for numpy 1.
OPENMMLAB = [
    'mmengine>=0.10,<1',
    'mmcv>=2.1,<2.2',
    'mmdet>=3.3,<4',
    'mmsegmentation>=1.2.2,<2',
    'mmpretrain>=1.2,<2',
    'torchvision',
    'safetensors',
    'numpy<2',
    'ftfy',  # mmseg imports these two without declaring them
    'regex',
]

# What `mmlavit export` needs; torch from 2.6 on. Tried together: 1.23.2, 0.7.2, 1.31.1.
EXPORT = ['onnx', 'onnxscript', 'onnxruntime']

# What `make docs` makes the site with. Tried together: 9.0.4, 5.2.0, 2025.12.19, 0.5.2.
DOCS = ['sphinx', 'myst-parser', 'furo', 'sphinx-copybutton']
# What `mmlavit attention` and `saturation` draw with. Tried together: 3.11.2, 3.9.2.
ANALYSIS = ['matplotlib', 'bokeh>=3.4']

# What the tests, the checks and the demo of this repository run with, beside one of the two above.
DEV = [
    *EXPORT,
    *DOCS,
    *ANALYSIS,
    'hypothesis',
    'mypy',
    'psutil',
    'pytest',
    'pytest-timeout',
    'pytest-xdist',
    'ruff',
    'scipy',  # the intervals of tools/experiments.py and tools/compare_commits.py
    'tensorboard',
    'timm',  # peers of tools/benchmark.py
    'tqdm',
    # CUDA builds of torch bring it; its interpreter runs the kernels where there is no GPU.
    "triton; sys_platform == 'linux' and platform_machine == 'x86_64'",
]


class BuildWithConfigs(build_py):
    """Adds configs and tools to the built package, in the folder .mim, where mim looks for them.

    They are copied into the build folder alone, so the source tree has one of each. An editable
    install has no such folder: there the repository itself is at hand.
    """

    def run(self) -> None:
        """Build the package, then add the folder."""
        super().run()
        mim = Path(self.build_lib, 'mmlavit', '.mim')
        # A config that an earlier build left in the build folder may be gone by now.
        shutil.rmtree(mim, ignore_errors=True)
        ignore = shutil.ignore_patterns('__pycache__', *REPOSITORY_TOOLS)
        for folder in ('configs', 'tools'):
            shutil.copytree(ROOT / folder, mim / folder, ignore=ignore)
        for file in ('model-index.yml', 'README.md'):
            shutil.copy(ROOT / file, mim)


setup(
    name='mmlavit',
    version=runpy.run_path(str(ROOT / 'mmlavit/version.py'))['__version__'],
    description='LaViT, the Less-Attention Vision Transformer, as a backbone for OpenMMLab',
    long_description=README.read_text(encoding='utf-8') if README.exists() else '',
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    project_urls={'Paper': 'https://arxiv.org/abs/2406.00427'},
    license_files=['LICENSE'],
    keywords=['vision transformer', 'less attention', 'backbone', 'object detection', 'OpenMMLab'],
    classifiers=[
        'Development Status :: 4 - Beta',
        'Intended Audience :: Science/Research',
        'Operating System :: OS Independent',
        'Programming Language :: Python :: 3',
        'Programming Language :: Python :: 3.10',
        'Programming Language :: Python :: 3.11',
        'Programming Language :: Python :: 3.12',
        'Topic :: Scientific/Engineering :: Image Recognition',
    ],
    python_requires='>=3.10',
    packages=find_packages(include=['mmlavit', 'mmlavit.*']),
    entry_points={'console_scripts': ['mmlavit = mmlavit.__main__:main']},
    package_data={'mmlavit': ['py.typed']},  # type checkers may read its annotations (PEP 561)
    install_requires=['torch>=2.1', 'numpy'],
    extras_require={
        'onedl': ONEDL,
        'openmmlab': OPENMMLAB,
        'export': EXPORT,
        'docs': DOCS,
        'analysis': ANALYSIS,
        'dev': DEV,
    },
    cmdclass={'build_py': BuildWithConfigs},
    zip_safe=False,
)
