# Mask R-CNN in mixed precision, which needs a GPU: float16, and bfloat16 by
# --cfg-options optim_wrapper.dtype=bfloat16
_base_ = './maskrcnn_lavit_s_coco.py'

optim_wrapper = dict(type='AmpOptimWrapper')
