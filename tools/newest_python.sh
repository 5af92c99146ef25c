#!/bin/sh
# Prints the newest Python (3.13 down to 3.11) that starts on this machine; nothing where there is none.
runs() { "$1" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }
for version in 3.13 3.12 3.11; do
  if runs "python$version"; then command -v "python$version"; exit; fi
  # A pyenv shim answers only for the selected version; ask pyenv where the others lie.
  if full=$(pyenv latest "$version" 2>/dev/null) && prefix=$(pyenv prefix "$full" 2>/dev/null); then
    if runs "$prefix/bin/python3"; then echo "$prefix/bin/python3"; exit; fi
  fi
done
if runs python3; then command -v python3; fi
