# vpcctl: make help

PYTHON  ?= python3
PREFIX  ?= /usr/local
DESTDIR ?=

VPCCTL  := $(CURDIR)/vpcctl.py
BINDIR   = $(DESTDIR)$(PREFIX)/bin
COMPDIR  = $(DESTDIR)$(PREFIX)/share/bash-completion/completions
MANDIR   = $(DESTDIR)$(PREFIX)/share/man/man8
UNITDIR  = $(DESTDIR)/etc/systemd/system
UNIT     = $(UNITDIR)/vpcctl.service
WANTED   = $(UNITDIR)/multi-user.target.wants/vpcctl.service
DATA     = $(or $(VPCCTL_DATA),$(CURDIR)/.vpcctl_data)

# what systemd would read as a specifier, a variable or a quote
quoted   = $(subst ",\",$(subst $$,$$$$,$(subst %,%%,$(subst \,\\,$(1)))))

# The apps that `restore` starts stay when the unit is stopped or restarted: only vpcctl itself is its process.
define SERVICE
[Unit]
Description=vpcctl: bring the VPCs back after a restart
Wants=network-online.target
After=network-online.target
ConditionPathExistsGlob=$(subst %,%%,$(DATA))/vpc_*

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart="$(call quoted,$(VPCCTL))" --data-dir "$(call quoted,$(DATA))" --quiet restore
ExecReload="$(call quoted,$(VPCCTL))" --data-dir "$(call quoted,$(DATA))" --quiet restore
KillMode=process
TimeoutStartSec=300

[Install]
WantedBy=multi-user.target
endef
export SERVICE

# ip and iptables live in /usr/sbin, which an ordinary user may not have on PATH
export PATH := $(PATH):/usr/sbin:/sbin
export PYTHONDONTWRITEBYTECODE := 1

.DEFAULT_GOAL := help
.PHONY: help install uninstall check test test-faults test-distros bench demo clean packages flag-check

help: ## this list
	@echo "vpcctl: cloud VPCs on one Linux machine"
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: packages ## the tutorial in a throw-away sandbox, every step checked
	@$(PYTHON) tests/demo.py

test: packages flag-check ## all tests; the end-to-end ones run in sandboxes
	@$(PYTHON) tests/run.py

check: flag-check ## the command table and the tests that need no root
	@$(PYTHON) tests/run.py --unit

flag-check:
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) is missing: install python3 (3.6 or later)"; exit 1; }
	@$(PYTHON) $(VPCCTL) flag-check

test-faults: packages ## the tests that inject failures and kills
	@$(PYTHON) tests/run.py --faults --deadline 2400

test-distros: ## make demo and make test on Debian 11, 12 and 13, each made from nothing (root; SYSTEMS="11 13")
	@$(PYTHON) tests/distros.py $(SYSTEMS)

bench: ## time the commands
	@sh tests/packages.sh --bench
	@$(PYTHON) tests/bench.py

install: packages ## vpcctl on PATH (packages that are missing, then a symlink in $PREFIX/bin)
	@mkdir -p "$(BINDIR)" || { echo "make: cannot write to $(BINDIR): try sudo make install"; exit 1; }
	@chmod +x "$(VPCCTL)" 2>/dev/null || true
	@if [ -e "$(BINDIR)/vpcctl" ] && [ ! -L "$(BINDIR)/vpcctl" ]; then \
	    echo "make: $(BINDIR)/vpcctl exists and is not a symlink: it is left alone"; exit 1; fi
	@ln -sfn "$(VPCCTL)" "$(BINDIR)/vpcctl" || { echo "make: cannot write to $(BINDIR): try sudo make install"; exit 1; }
	@for pair in "completion bash|$(COMPDIR)/vpcctl" "man|$(MANDIR)/vpcctl.8"; do \
	    file="$${pair#*|}"; text=$$($(PYTHON) "$(VPCCTL)" $${pair%%|*} 2>/dev/null) && [ -n "$$text" ] || continue; \
	    mkdir -p "$$(dirname "$$file")" && printf '%s\n' "$$text" > "$$file"; done
	@echo "Installed: $(BINDIR)/vpcctl -> $(VPCCTL)"
	@d="$(CURDIR)"; while [ "$$d" != / ]; do \
	    if [ -n "$$(find "$$d" -prune \( ! -user 0 ! -user "$$(id -u)" -o \( -perm -020 -o -perm -002 \) ! -perm -1000 \))" ]; then \
	        echo "make: note: $$d is $$(ls -ld "$$d" | awk '{ print $$1, $$3, $$4 }'): whoever may write there decides what vpcctl does"; \
	        break; fi; d=$$(dirname "$$d"); done
	@if [ -n "$(DESTDIR)" ] || { [ "$$(id -u)" = 0 ] && [ -d /run/systemd/system ]; }; then \
	    mkdir -p "$(UNITDIR)/multi-user.target.wants" && printf '%s\n' "$$SERVICE" > "$(UNIT)" && \
	    ln -sfn ../vpcctl.service "$(WANTED)" || exit 1; \
	    if [ -z "$(DESTDIR)" ]; then systemctl daemon-reload || exit 1; fi; \
	    echo "Installed: $(UNIT): after a restart, the VPCs come back by themselves"; \
	else echo "After a restart: sudo $(BINDIR)/vpcctl restore (add it to what runs at boot, such as /etc/rc.local)"; fi

uninstall: ## take away what install made; VPCs and packages stay
	@if [ -L "$(BINDIR)/vpcctl" ]; then rm -f "$(BINDIR)/vpcctl" || exit 1; echo "Removed $(BINDIR)/vpcctl"; fi
	@rm -f "$(COMPDIR)/vpcctl" "$(MANDIR)/vpcctl.8"
	@if [ -e "$(UNIT)" ]; then rm -f "$(UNIT)" "$(WANTED)" || exit 1; echo "Removed $(UNIT)"; \
	    if [ -z "$(DESTDIR)" ] && [ -d /run/systemd/system ]; then systemctl daemon-reload || exit 1; fi; fi

clean: ## remove what running leaves behind (never the records of live VPCs)
	@find . -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || { \
	    echo "make: some of it belongs to root: try sudo make clean"; exit 1; }
	@find . -name '*.pyc' -type f -exec rm -f {} +
	@if [ -d .vpcctl_data ] && ls .vpcctl_data/vpc_*.json >/dev/null 2>&1; then \
	    echo ".vpcctl_data is kept: it holds VPCs (vpcctl cleanup-all deletes them)"; \
	else rm -rf .vpcctl_data; fi

packages:
	@sh tests/packages.sh
