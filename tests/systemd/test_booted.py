def test_x(machine):
    print(machine.run("systemctl", "list-units", "--failed"))
    print(machine.run("ls", "-la", "/opt/rtservice/bin", "/etc/systemd/system"))
    print(machine.run("/opt/rtservice/bin/twistd", "rtservice", "--version"))
    print(machine.run("systemd-sysusers"))
    assert 0
