import cython
def compiled() -> bool:
    return cython.compiled
