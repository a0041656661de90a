"""Where matrices of weights come from: modules, state dicts, arrays, files, adapters."""
