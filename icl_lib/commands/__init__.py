"""Everything with a `main()`: `python -m icl_lib.commands.NAME`."""
