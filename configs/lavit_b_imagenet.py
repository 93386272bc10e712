_base_ = './lavit_s_imagenet.py'

model = dict(backbone=dict(arch='base', drop_path_rate=0.3))
