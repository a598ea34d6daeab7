"""`python -m osv_jax.convert_weights`, from a checkout: imports weights from PyTorch, exports what was trained."""

from osv_jax.convert_weights import run

if __name__ == "__main__":
    run()
