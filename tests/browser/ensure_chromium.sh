#!/bin/sh
# Finds a Chromium for the browser tests, or installs Debian's where that is allowed; says what to do otherwise.
set -eu
browser="${RANKLOOP_CHROMIUM:-/usr/bin/chromium}"
[ -x "$browser" ] && exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
  echo "Installing Debian's Chromium for the browser tests"
  apt-get update -qq >/dev/null
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core >/dev/null
  exit 0
fi
echo "The browser tests need Chromium at $browser: install it (Debian: apt-get install chromium) or set RANKLOOP_CHROMIUM." >&2
exit 1
