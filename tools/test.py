"""Hands over to the test.py of mmdet, mmseg or mmpretrain, by the config's default_scope.

All options are that script's own; see --help.
"""

from mmlavit.engine.launch import main

if __name__ == '__main__':
    main('test.py')
