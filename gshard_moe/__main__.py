"""`python -m gshard_moe` is `gshard-moe`."""

from gshard_moe.cli import main

main()
