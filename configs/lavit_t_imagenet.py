_base_ = './lavit_s_imagenet.py'

model = dict(backbone=dict(arch='tiny', drop_path_rate=0.1), head=dict(in_channels=480))
