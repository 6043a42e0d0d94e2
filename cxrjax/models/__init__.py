from cxrjax.models.registry import create

__all__ = ["create"]
