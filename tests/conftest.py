"""What every test needs before it imports a toolbox."""

from mmlavit.compat import repair_torchvision

repair_torchvision()
