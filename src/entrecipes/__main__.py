"""`python -m entrecipes` is the `entrecipes` command."""

from entrecipes.cli import main

raise SystemExit(main())
