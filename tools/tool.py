"""Starts any script of the toolbox that a config was written for, or of another one.

``python tools/tool.py analysis_tools/get_flops.py configs/semfpn_lavit_t_ade20k.py`` hands over to
mmseg's own script, with all its options, as ``mmlavit tool`` does.
"""

import sys

from mmlavit.__main__ import main

if __name__ == '__main__':
    sys.exit(main(['tool', *sys.argv[1:]]))
