"""What "equal" means, measured and judged: used by export, tood-bench and the self-test."""
