"""Pipeline parallelism for an unmodified train step: capture → microbatch → cut → stages → schedule → executor."""
