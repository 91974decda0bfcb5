"""`python -m castbench VERB`: every rule of the workflow is one verb."""

from castbench.cli import main

raise SystemExit(main())
