"""Starts any script of the toolbox that a config was written for, or of another one.

``python tools/tool.py analysis_tools/get_flops.py configs/semfpn_lavit_t_ade20k.py`` hands over to
mmseg's own script, with all its options. NAME is a path in the toolbox's folder ``tools``.
"""

import sys

from mmlavit.engine.launch import main

if __name__ == '__main__':
    if len(sys.argv) < 2 or sys.argv[1].startswith('-'):
        print(f'usage: tool.py NAME [ARGUMENTS]\n\n{__doc__}')
        sys.exit(0 if sys.argv[1:2] and sys.argv[1] in ('-h', '--help') else 2)
    main(sys.argv.pop(1))
