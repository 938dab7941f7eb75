"""`python -m vllm_wt_plugin.cli`, where the script `vllm-wt` is not on the path."""

from vllm_wt_plugin.cli import main

if __name__ == "__main__":
    main()
