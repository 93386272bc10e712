_base_ = './upernet_lavit_s_ade20k.py'

model = dict(backbone=dict(arch='base', drop_path_rate=0.3))
