from benchmarks.targets.peer import hold_pytorch

if __name__ == "__main__":
    hold_pytorch()
    from benchmarks.targets.report import main

    main()
