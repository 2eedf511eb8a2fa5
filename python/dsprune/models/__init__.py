"""The networks that the method is shown on: CIFAR ResNets and the ImageNet ResNet-18 and ResNet-50.

State dict names are those of published weights, so that those load unchanged: `cifar_resnet` uses
`stem.conv`, `stage1.0.conv_a`, ..., `classifier`; `resnet18` and `resnet50` use torchvision's names.
"""

from dsprune.models.cifar import CIFAR_DEPTHS, CifarResNet, cifar_resnet
from dsprune.models.resnet import ResNet, resnet18, resnet50

__all__ = ["CIFAR_DEPTHS", "CifarResNet", "ResNet", "cifar_resnet", "resnet18", "resnet50"]
