"""`python cli.py ...` from a checkout: the same command as `owl-deploy`."""

from owl_deploy.cli import main

if __name__ == "__main__":
    main()
