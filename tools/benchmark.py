"""Times LaViT-S beside mmdet's Swin-T on this machine and prints a table of ratios."""

import argparse

from mmlavit.benchmark import report

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--rounds', type=int, default=7, help='rounds of each task (default: 7)')
    print(report(parser.parse_args().rounds))
