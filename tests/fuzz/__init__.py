"""Random calls of every raw operator and public function; see ``__main__``."""
