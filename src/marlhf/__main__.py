from marlhf.cli import main

main()
