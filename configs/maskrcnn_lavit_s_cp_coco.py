# Mask R-CNN with gradient checkpointing: the blocks of the backbone run again in the backward pass
# in the place of keeping what they computed. Less memory, more time, the same results.
_base_ = './maskrcnn_lavit_s_coco.py'

model = dict(backbone=dict(with_cp=True))
