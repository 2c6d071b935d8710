#!/bin/sh
# Fetch Tiny Shakespeare (1.1 MB) to data/tinyshakespeare.txt, or check the copy that lies there already.
set -eu

url=https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt
sum=86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed
file=$(dirname "$0")/tinyshakespeare.txt

die() { echo "tinyshakespeare.sh: $*" >&2; exit 1; }

is_right() {
  if command -v sha256sum >/dev/null; then found=$(sha256sum <"$1")
  elif command -v shasum >/dev/null; then found=$(shasum -a 256 <"$1")
  else die "neither sha256sum nor shasum is here to check the file"
  fi
  [ "${found%% *}" = "$sum" ]
}

if [ -e "$file" ]; then
  is_right "$file" || die "$file is not the expected text (its SHA-256 differs); delete it and run this again"
  echo "$file is here and right"
  exit 0
fi

part=$file.part.$$
trap 'rm -f "$part"' EXIT
trap 'exit 1' HUP INT TERM
if command -v curl >/dev/null; then curl -fsSL -o "$part" "$url" || die "cannot download $url"
elif command -v wget >/dev/null; then wget -q -O "$part" "$url" || die "cannot download $url"
else die "neither curl nor wget is here; put $url at $file yourself"
fi
is_right "$part" || die "the download from $url is not the expected text (its SHA-256 differs)"
mv "$part" "$file"
echo "$file fetched and right"
