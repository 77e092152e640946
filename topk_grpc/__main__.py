"""`python -m topk_grpc` is the command `topk`."""

from topk_grpc.cli.main import main

if __name__ == "__main__":
    main()
