"""The command ``status``: versions, modules, workarounds and what ends them."""
