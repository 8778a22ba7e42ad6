#!/bin/bash
#
# lvs-DR.sh {start|stop} - the director of an LVS by direct routing
#
# chkconfig: 2345 90 10
# description: virtual address, rules and forwarding of the director

VIP=10.0.0.200
RIP1=10.0.0.205
RIP2=10.0.0.206

[ -f /etc/rc.d/init.d/functions ] && . /etc/rc.d/init.d/functions

case "$1" in
start)
    echo "start LVS of DirectorServer"
    # the virtual address
    ifconfig eth0:1 $VIP broadcast $VIP netmask 255.255.255.255 up
    route add -host $VIP dev eth0:1
    echo "1" >/proc/sys/net/ipv4/ip_forward
    # the rules
    ipvsadm -C
    ipvsadm -A -t $VIP:10087 -s wrr -p 60
    ipvsadm -a -t $VIP:10087 -r $RIP1:10087 -g -w 2
    ipvsadm -a -t $VIP:10087 -r $RIP2:10087 -g -w 2
    # show them
    ipvsadm
    ;;
stop)
    echo "stop LVS of DirectorServer"
    echo "0" >/proc/sys/net/ipv4/ip_forward
    ipvsadm -C
    ifconfig eth0:1 down
    ;;
*)
    echo "Usage: $0 {start|stop}"
    exit 1
    ;;
esac
