{{- define "nvshare.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" }}
{{- end }}

{{- define "nvshare.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" }}
{{- else }}
{{- $name := include "nvshare.name" . }}
{{- if contains $name .Release.Name }}
{{- .Release.Name | trunc 40 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name $name | trunc 40 | trimSuffix "-" }}
{{- end }}
{{- end }}
{{- end }}

{{- define "nvshare.selectorLabels" -}}
app.kubernetes.io/name: {{ include "nvshare.name" .root }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "nvshare.labels" -}}
app.kubernetes.io/name: {{ include "nvshare.name" .root }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
{{- with .component }}
app.kubernetes.io/component: {{ . }}
{{- end }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- end }}

{{- define "nvshare.tag" -}}
{{- .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{- define "nvshare.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ include "nvshare.tag" . }}
{{- end }}
{{- end }}

{{- /* The folder of the node that has libnvshare.so of this release. A pod keeps the release that it began with. */}}
{{- define "nvshare.libraryDir" -}}
{{- $release := include "nvshare.tag" . }}
{{- with .Values.image.digest }}{{ $release = . | replace ":" "-" | trunc 23 }}{{ end -}}
{{ .Values.node.libraryDir | trimSuffix "/" }}/{{ $release }}
{{- end }}

{{- /* What all three pods have in common: .root, .component, .settings (the component's values). */}}
{{- define "nvshare.pod" -}}
serviceAccountName: {{ include "nvshare.fullname" .root }}-{{ .component }}
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .root.Values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- if and (eq .root.Values.driver.access "runtimeClass") .root.Values.driver.runtimeClassName }}
runtimeClassName: {{ .root.Values.driver.runtimeClassName }}
{{- end }}
{{- with merge (dict) (.settings.nodeSelector | default dict) .root.Values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .root.Values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .root.Values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "nvshare.podMetadata" -}}
labels:
  {{- include "nvshare.selectorLabels" . | nindent 2 }}
  {{- with .root.Values.podLabels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
annotations:
  kubectl.kubernetes.io/default-container: {{ .component }}
  {{- with .root.Values.podAnnotations }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}

{{- /* Of a container: .root, .capabilities, .driver (whether it opens the driver's devices). */}}
{{- define "nvshare.securityContext" -}}
runAsUser: 0
runAsGroup: 0
readOnlyRootFilesystem: true
{{- if and .driver (eq .root.Values.driver.access "hostPath") .root.Values.driver.privileged }}
# The driver's devices are not in the container's device control group.
privileged: true
{{- else }}
allowPrivilegeEscalation: false
capabilities:
  drop: [ALL]
  {{- with .capabilities }}
  add: {{ toJson . }}
  {{- end }}
seccompProfile: {type: RuntimeDefault}
{{- end }}
{{- with .root.Values.seLinuxOptions }}
seLinuxOptions:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "nvshare.installLibrary" -}}
- name: install-library
  image: {{ include "nvshare.image" .root }}
  imagePullPolicy: {{ .root.Values.image.pullPolicy }}
  command: [/bin/sh, -c]
  args:
  - |
    {{- .root.Files.Get "files/install-library" | nindent 4 }}
  - install-library
  - /usr/lib/nvshare/libnvshare.so
  - {{ include "nvshare.libraryDir" .root }}
  securityContext:
    {{- include "nvshare.securityContext" (dict "root" .root "driver" false) | nindent 4 }}
  resources:
    requests: {cpu: 10m, memory: 32Mi}
  volumeMounts:
  - {name: library, mountPath: {{ .root.Values.node.libraryDir }}}
{{- end }}

{{- define "nvshare.nvml" -}}
{{- if eq .Values.driver.access "hostPath" -}}
/usr/local/nvidia/libnvidia-ml.so.1
{{- else -}}
libnvidia-ml.so.1
{{- end }}
{{- end }}

{{- define "nvshare.driverEnv" -}}
{{- if eq .Values.driver.access "runtimeClass" }}
- {name: NVIDIA_VISIBLE_DEVICES, value: all}
- {name: NVIDIA_DRIVER_CAPABILITIES, value: utility}
{{- end }}
{{- end }}

{{- define "nvshare.driverMounts" -}}
{{- if eq .Values.driver.access "hostPath" }}
- {name: nvml, mountPath: {{ include "nvshare.nvml" . }}, readOnly: true}
{{- if .Values.driver.privileged }}
- {name: dev, mountPath: /dev}
{{- end }}
{{- end }}
{{- end }}

{{- define "nvshare.driverVolumes" -}}
{{- if eq .Values.driver.access "hostPath" }}
- name: nvml
  hostPath: {path: {{ .Values.driver.nvmlLibrary }}, type: File}
{{- if .Values.driver.privileged }}
- name: dev
  hostPath: {path: /dev, type: Directory}
{{- end }}
{{- end }}
{{- end }}

{{- define "nvshare.commonVolumes" -}}
- name: runtime
  hostPath: {path: {{ .Values.node.runtimeDir }}, type: DirectoryOrCreate}
- name: library
  hostPath: {path: {{ .Values.node.libraryDir }}, type: DirectoryOrCreate}
{{- include "nvshare.driverVolumes" . }}
{{- end }}

{{- /* Arguments that the device plugin and the DRA driver share. */}}
{{- define "nvshare.kubernetesArguments" -}}
- --shares={{ .Values.shares }}
- --arbiter-grace={{ .Values.arbiterGrace }}
- --kubelet-dir={{ .Values.node.kubeletDir }}
- --cdi-dir={{ .Values.node.cdiDir }}
- --runtime-dir={{ .Values.node.runtimeDir }}
- --host-runtime-dir={{ .Values.node.runtimeDir }}
- --host-library-dir={{ include "nvshare.libraryDir" . }}
- --gpu-cdi-kind={{ .Values.driver.gpuCdiKind }}
- --nvml={{ include "nvshare.nvml" . }}
{{- end }}
