"""The `owl-deploy` command."""

from owl_deploy.cli.app import main

__all__ = ["main"]
