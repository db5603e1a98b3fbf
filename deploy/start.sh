#!/bin/sh
# Starts Redis with redis.conf and the users of users.acl. Their passwords come from the environment, and only SHA-256
# hashes of them reach the server, in a file that only its user can read. Arguments go to redis-server:
#     sh start.sh --port 6380
set -eu
umask 077
cd "$(dirname "$0")"
: "${REDIS_WRITER_PASSWORD:?has no value: export a long random one, as of openssl rand -hex 32}"
: "${REDIS_NOTEBOOK_PASSWORD:?has no value: export a long random one, as of openssl rand -hex 32}"
digest() { printf %s "$1" | sha256sum | cut -c 1-64; }
operator=${REDIS_OPERATOR_PASSWORD:+on #$(digest "$REDIS_OPERATOR_PASSWORD")} # stays off without one
acl=$(mktemp)
sed -e "s/^user writer off/user writer on #$(digest "$REDIS_WRITER_PASSWORD")/" \
    -e "s/^user notebook off/user notebook on #$(digest "$REDIS_NOTEBOOK_PASSWORD")/" \
    -e "s/^user operator off/user operator ${operator:-off}/" users.acl >"$acl"
unset REDIS_WRITER_PASSWORD REDIS_NOTEBOOK_PASSWORD REDIS_OPERATOR_PASSWORD
export LC_ALL=C # with a locale that does not exist, Redis does not start
exec redis-server ./redis.conf --aclfile "$acl" "$@"
