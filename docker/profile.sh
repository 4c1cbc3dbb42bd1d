# For login shells, whose PATH /etc/profile begins anew: the environment, first.
export PATH=/opt/prdp_fem/.venv/bin:$PATH
