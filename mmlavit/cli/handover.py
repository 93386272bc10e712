"""``mmlavit train``, ``test`` and ``tool``: scripts of the toolboxes, with all their options."""

from __future__ import annotations

import sys
import textwrap
from collections import defaultdict
from pathlib import PurePosixPath

from ..engine import launch
from ..errors import MMLaViTError

_COMMON = """
CONFIG is a file, or the name of a config that comes with mmlavit ('mmlavit configs' lists them),
given first. Everything goes to the {script} of the toolbox that the config's default_scope names,
with all its options. Checkpoint files are read without running what is in them (torch 2.6 on),
and what is wrong with the data is said before the first step.
"""
_HELP = {
    'train': f"""
Trains the model of a config:

    mmlavit train maskrcnn_lavit_n_shapes
    mmlavit train CONFIG --resume
    mmlavit train CONFIG --cfg-options model.backbone.init_cfg.checkpoint=PRETRAINED.pth
    torchrun --nproc_per_node=8 -m mmlavit train CONFIG --launcher pytorch
{_COMMON}""",
    'test': f"""
Evaluates a checkpoint of a config's model on its test data:

    mmlavit test CONFIG CHECKPOINT
    mmlavit test CONFIG CHECKPOINT --show-dir pictures
    torchrun --nproc_per_node=8 -m mmlavit test CONFIG CHECKPOINT --launcher pytorch
{_COMMON}""",
}
_TOOL = """
usage: mmlavit tool NAME [ARGUMENTS]

Starts any script of the toolboxes, with all its options:

    mmlavit tool get_flops CONFIG
    mmlavit tool analysis_tools/browse_dataset.py CONFIG --output-dir pictures
    mmlavit tool get_flops CONFIG --help

NAME is one of those below, or its last part. It is looked for in the toolbox that the config's
default_scope names, and then in the others. A config of mmlavit's own may be given by its name,
right after NAME.
"""


def main() -> None:
    """Run the command that ``sys.argv`` has.

    Raises:
        MMLaViTError: If there is no such script, or none is named.
    """
    command = sys.argv[0].split()[-1]
    name, prog = f'{command}.py', sys.argv[0]
    if command == 'tool':
        if {'-h', '--help'} & set(sys.argv[1:2]):
            print(_tool_help())
            return
        if not sys.argv[1:] or sys.argv[1].startswith('-'):
            raise MMLaViTError('mmlavit tool NAME lacks the NAME of a script; --help lists them')
        name = sys.argv.pop(1)
        prog = f'{prog} {name}'
    elif {'-h', '--help'} & set(sys.argv):
        argv = launch.with_config_path(sys.argv[1:])
        script = launch.find_script(name, argv)
        toolbox = script.parts[script.parts.index('.mim') - 1]
        others = '' if launch.find_config(argv) else ', for there is no config that names another'
        print(_HELP[command].format(script=name))
        print(f"The help of {toolbox}'s own {name}{others}:\n")
    launch.main(name, prog)


def _tool_help() -> str:
    lines = [_TOOL.strip()]
    for toolbox, scripts in launch.scripts().items():
        lines += ['', f'{toolbox}:']
        folders = defaultdict(list)
        for script in map(PurePosixPath, scripts):
            folders[str(script.parent)].append(script.name)
        for folder, names in folders.items():
            start = '  ' if folder == '.' else f'  {folder}/ '
            lines.append(
                textwrap.fill(' '.join(names), 98, initial_indent=start, subsequent_indent='    ')
            )
    return '\n'.join(lines)
